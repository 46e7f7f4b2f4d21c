"""FP8 as the report trains with it (sections 3.3 and 3.5.2): from numbers to linear maps."""
