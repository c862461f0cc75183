"""What may be a secret, or says whose machine it was, in texts that others read."""

import json
import time

import pytest

from diffsynth.core.masking import in_strings, is_masked, masked, masked_values, without_folders

MASKED = {
    "https://user:token@host/x": "https://***@host/x",
    "s3://key:sec/ret@bucket/x?a=1": "s3://key:sec/ret@bucket/x?a=1",  # no user information by RFC 3986
    "https://u:p@ss@host": "https://***@host",
    "s3://key:secret@bucket/x": "s3://***@bucket/x",
    "abfss://train@acc.dfs.core.windows.net/data": "abfss://train@acc.dfs.core.windows.net/data",  # a container
    "see https://u:p@a.b/c, and http://d@e": "see https://***@a.b/c, and http://***@e",
    "https://h/x?token=abc&size=3#end": "https://h/x?token=***&size=3#end",
    "https://h/x?X-Amz-Date=1&X-Amz-Signature=f0&id=7": "https://h/x?X-Amz-Date=***&X-Amz-Signature=***&id=7",
    "https://h/x?sv=1&sig=a%2Fb": "https://h/x?sv=1&sig=***",
    "https://h/x?a=1&amp;api_key=k": "https://h/x?a=1&amp;api_key=***",
    "https://h/x?tokenizer=a&author=b&max_tokens=5&key=cats": "https://h/x?tokenizer=a&author=b&max_tokens=5&key=cats",
    "https://h/x?accessToken=a&AWSAccessKeyId=b&auth=c": "https://h/x?accessToken=***&AWSAccessKeyId=***&auth=***",
    "https://h/x?key=AIzaSy0123456789abcdef&client_secret.1=s": "https://h/x?key=***&client_secret.1=***",
    "https://u:${oc.env:T}@h?token=${oc.env:T}": "https://u:${oc.env:T}@h?token=${oc.env:T}",
    "https://${x}:real@h/ https://${x}@h https://${x}real@h": "https://${x}:***@h/ https://${x}@h https://${x}***@h",
    "https://h/x?token=${oc.env:A}real&sig=a${b:${c}}d": "https://h/x?token=${oc.env:A}***&sig=***${b:${c}}***",
    "https://h/x#access_token=a&jwt=b": "https://h/x#access_token=***&jwt=***",
    "https://h/x?pass=a&bearer=b&sas=c&hmac=d&otp=e": "https://h/x?pass=***&bearer=***&sas=***&hmac=***&otp=***",
    "https://h/x?code=us&session=1&session=0123456789abcdef": "https://h/x?code=us&session=1&session=***",
    "https://h/x?password[]=a&token%5B%5D=b&GoogleAccessId=c": "https://h/x?password[]=***&token%5B%5D=***&GoogleAccessId=***",
    "https:\\/\\/u:p@h and s3:\\/\\/u:p@h": "https:\\/\\/***@h and s3:\\/\\/***@h",
    "https://h/x?compass=n&zipcode=1&bypass=2": "https://h/x?compass=n&zipcode=1&bypass=2",
    "hf://datasets/me/photos@main/a.png?tokens": "hf://datasets/me/photos@main/a.png?tokens",
    "mail me@home.org about a cat@night": "mail me@home.org about a cat@night",
}


@pytest.mark.parametrize("text", MASKED)
def test_credentials_in_urls_are_masked_and_nothing_else_is(text):
    assert masked(text) == masked(masked(text)) == MASKED[text]
    assert is_masked(masked(text)) == (MASKED[text] != text)


def test_masked_json_is_json():
    nested = {"a": ['https://u:"p@h?token="x', "https://h?token=\\"], "b": 1}
    assert json.loads(masked(json.dumps(nested))) == {"a": ['https://u:"p@h?token="x', "https://h?token=\\"], "b": 1}
    assert in_strings(masked, {"a": ("x://u:p@h", 1)}) == {"a": ["x://***@h", 1]}


@pytest.mark.parametrize(
    "value, shown",
    [
        ("https://u:it's\"a\\p@h/x?token=it's&a=1", "https://***@h/x?token=***&a=1"),
        ("https://u:LEAK\u00e92@h/x", "https://***@h/x"),
        ("dataset.path='https://h/x?token=it\\'s'", "dataset.path='https://h/x?token=***'"),
        ('["https://h?token=a"]', '["https://h?token=***"]'),
    ],
)
def test_quotes_belong_to_the_urls_of_values(value, shown):
    assert masked_values([{"a": value}]) == masked_values(masked_values([{"a": value}])) == [{"a": shown}]


@pytest.mark.parametrize(
    "text",
    [
        *("a" * 10**6, "://" * 10**5, "?token" * 10**5, "/a" * 10**5, "://" + "a@" * 10**5, "?a=" * 10**5),
        *("${" * 10**5, "https://" + "${a" * 10**5 + "@", "?token=" + "${{}" * 10**5),
    ],
)
def test_the_time_grows_with_the_text_not_with_its_square(text):
    start = time.monotonic()
    masked(text), masked_values(text), is_masked(text), without_folders(text)
    assert time.monotonic() - start < 5  # 0.1 s, and minutes if it were the square


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/alice/photos/", "***/photos"),
        ("C:\\Users\\alice\\photos", "***/photos"),
        ("~/photos", "***/photos"),
        ("../alice/photos", "***/photos"),
        ("--path=/home/alice/photos", "--path=***/photos"),
        ("${oc.env:DATA,/home/alice/photos}", "${oc.env:DATA,***/photos}"),
        *((same, same) for same in ("Qwen/Qwen-Image", "${output_root}/x", "https://h/a/b", "a cat/dog", "~5 px")),
    ],
)
def test_paths_are_shortened_to_names(text, shown):
    assert without_folders(text) == shown
