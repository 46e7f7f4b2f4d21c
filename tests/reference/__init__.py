"""Slow references: plain NumPy float64, written from the equations of the report, one file an idea.

Each handles one sequence, loops over whatever the equations index, and takes the model's own
parameter names (matrices are `[in, out]`) as nested dicts of arrays.
"""
