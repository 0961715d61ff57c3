"""Tables, plots, regressions and predictions from results files."""
