"""Rebuild the emoji images and their csv files from npm packages; the same bytes every time.

    pip install resvg-py pillow && python data/emoji/build.py

Needs `npm` on the path. The committed files were made with resvg-py 0.5.0 and pillow 13.0.0.
"""

import csv
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = "unicode-emoji-json@0.9.0"
STYLES = {
    "color": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "line": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
SIZE, RENDER_SIZE, QUALITY = 64, 256, 90
HOLD_OUT_EVERY = 5
# Words that replace the style in captions, so that the base model learns to read captions with an unknown style.
ADJECTIVES = """
    3d, big, bright, cheerful, classic, clean, clear, colorful, cute, detailed, fancy, fine, friendly, glossy, good,
    happy, lovely, modern, neat, nice, pretty, round, shiny, simple, small, smooth, soft, sweet, tidy, vivid"""
ADJECTIVES_EACH = 4  # captions of an image with another adjective

# Chosen by eye: recognisable, different from each other, and present in all three styles. No people, flags or symbols,
# and nothing that the artwork's owner excludes (paperclips, technologists, video game, joystick).
CONCEPTS = {
    "Food & Drink": """
        grapes, watermelon, tangerine, lemon, banana, pineapple, red apple, pear, peach, cherries, strawberry,
        blueberries, kiwi fruit, tomato, coconut, avocado, eggplant, carrot, ear of corn, hot pepper, bell pepper,
        leafy green, broccoli, garlic, onion, peanuts, pea pod, bread, croissant, baguette bread, pretzel, pancakes,
        waffle, cheese wedge, meat on bone, poultry leg, bacon, hamburger, french fries, pizza, hot dog, taco, egg,
        cooking, popcorn, butter, salt, rice ball, spaghetti, sushi, soft ice cream, doughnut, cookie,
        birthday cake, cupcake, chocolate bar, candy, lollipop, honey pot, hot beverage, teapot, wine glass,
        cocktail glass, beer mug, bubble tea, fork and knife""",
    "Animals & Nature": """
        monkey face, gorilla, dog face, fox, raccoon, cat, lion, tiger face, unicorn, zebra, deer, cow, pig face,
        ram, camel, giraffe, elephant, mouse, rabbit face, chipmunk, hedgehog, bat, bear, koala, panda, sloth,
        skunk, kangaroo, turkey, rooster, hatching chick, penguin, dove, duck, swan, owl, flamingo, peacock, parrot,
        frog, crocodile, turtle, snake, dragon, sauropod, t-rex, spouting whale, dolphin, seal, tropical fish,
        shark, octopus, spiral shell, crab, lobster, snail, butterfly, ant, honeybee, lady beetle, spider, bouquet,
        rose, sunflower, tulip, potted plant, evergreen tree, palm tree, cactus, four leaf clover, maple leaf,
        mushroom""",
    "Travel & Places": """
        globe showing americas, compass, snow-capped mountain, volcano, brick, house, office building, factory,
        castle, tent, sunrise, ferris wheel, circus tent, locomotive, bus, ambulance, fire engine, police car,
        automobile, tractor, racing car, motor scooter, bicycle, skateboard, roller skate, fuel pump,
        vertical traffic light, stop sign, anchor, ring buoy, sailboat, ship, airplane, helicopter, rocket,
        flying saucer, luggage, hourglass done, alarm clock, crescent moon, thermometer, sun, ringed planet, star,
        cloud, tornado, rainbow, umbrella, high voltage, snowflake, snowman, fire, droplet, water wave""",
    "Activities": """
        jack-o-lantern, balloon, party popper, wrapped gift, trophy, sports medal, soccer ball, basketball,
        american football, tennis, bowling, boxing glove, fishing pole, running shirt, bullseye, yo-yo, kite,
        pool 8 ball, crystal ball, magic wand, game die, puzzle piece, teddy bear, artist palette, yarn""",
    "Objects": """
        glasses, necktie, t-shirt, jeans, scarf, gloves, socks, dress, handbag, backpack, running shoe,
        high-heeled shoe, crown, top hat, graduation cap, lipstick, ring, gem stone, megaphone, bell, musical note,
        microphone, headphone, radio, saxophone, trumpet, guitar, violin, drum, mobile phone, telephone, battery,
        laptop, floppy disk, television, camera, magnifying glass tilted left, candle, light bulb, open book, books,
        scroll, money bag, package, pencil, paintbrush, scissors, locked, key, hammer, axe, shield, wrench, gear,
        magnet, ladder, test tube, microscope, telescope, pill, bed, chair, toilet, broom, bucket, toothbrush,
        shopping cart, moai""",
    "Smileys & Emotion": """
        grinning face, smiling face with heart-eyes, sleeping face, cowboy hat face, smiling face with sunglasses,
        loudly crying face, skull, pile of poo, ghost, alien, robot, love letter, broken heart, red heart, collision""",
}


def read_package(package, file, folder):
    """Download an npm package to `folder` and parse its JSON file `file`."""
    run = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(Path(folder, run.stdout.split()[-1])) as archive:
        return json.load(archive.extractfile(f"package/{file}"))


def choose_concepts(groups):
    """(slug, name) of every chosen concept, in Unicode's order."""
    wanted = {name.strip() for names in CONCEPTS.values() for name in names.split(",")}
    emojis = [emoji for group in groups if group["name"] in CONCEPTS for emoji in group["emojis"]]
    chosen = [(e["slug"].replace("_", "-"), e["name"].lower()) for e in emojis if e["name"].lower() in wanted]
    missing = wanted - {name for _, name in chosen}
    if missing:
        raise KeyError(f"{NAMES} has no {sorted(missing)}")
    return chosen


def render(icons, slug):
    """An icon on white as an RGB image; Pillow resizes RGBA premultiplied, so that edges get no dark fringes."""
    body, width, height = icons["icons"][slug]["body"], icons["width"], icons["height"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", icon.size, "white"), icon).convert("RGB")


def write_images(style, icons, slugs):
    folder = HERE / style
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for slug in slugs:
        render(icons, slug).save(folder / f"{slug}.webp", quality=QUALITY, method=6)


def describe(style, concepts):
    """(image, prompt) of every concept in one style."""
    return [(f"{style}/{slug}.webp", f"a {style} emoji of {name}") for slug, name in concepts]


def rephrase(concepts):
    """(image, prompt) of the colour images, eight captions each: four plain ones, four with another adjective."""
    adjectives = [adjective.strip() for adjective in ADJECTIVES.split(",")]
    for number, (slug, name) in enumerate(concepts):
        chosen = [adjectives[(number + offset * 7) % len(adjectives)] for offset in range(ADJECTIVES_EACH)]
        captions = [f"a {word} emoji of {name}" for word in ["color"] * (ADJECTIVES_EACH - 1) + chosen]
        yield from ((f"color/{slug}.webp", caption) for caption in [f"an emoji of {name}", *captions])


def write_csv(name, rows):
    with open(HERE / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "prompt"), *rows])


def write_split(split, concepts):
    for style in STYLES:
        write_csv(f"{style}_{split}", describe(style, concepts))
    write_csv(f"all_{split}", [row for style in STYLES for row in describe(style, concepts)])


def main():
    with tempfile.TemporaryDirectory() as folder:
        concepts = choose_concepts(read_package(NAMES, "data-by-group.json", folder))
        for style, package in STYLES.items():
            write_images(style, read_package(package, "icons.json", folder), [slug for slug, _ in concepts])
    held_out = concepts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    write_csv("color", describe("color", concepts))
    write_csv("color_captions", rephrase(concepts))
    write_split("train", [concept for concept in concepts if concept not in held_out])
    write_split("held_out", held_out)


if __name__ == "__main__":
    main()
