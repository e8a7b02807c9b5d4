"""Code of one or two notebooks each: their figures, drawings, test cases and timing. Code for all is in `plotting`."""
