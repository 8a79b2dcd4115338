"""The public functions: a docstring, the checks of the arguments, then one call of a backend."""
