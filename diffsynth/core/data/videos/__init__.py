"""Videos: times of their frames without decoding, clips of them, and buckets of clips."""
