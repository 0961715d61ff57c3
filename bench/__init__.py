"""The benchmark suite: `python -m bench`, or `make bench`; README.md in this folder says how it measures."""
