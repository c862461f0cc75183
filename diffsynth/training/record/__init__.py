"""What a run writes down: numbers, trackers, a report of its data."""
