"""From a results file to tables, plots, regressions and predictions."""
