"""Whether anything was learned: features, probes with intervals, pictures, one page."""
