"""What a run writes: metrics (`numbers`, `trackers`), a report of its data (`data_report`), and which data (`data`)."""
