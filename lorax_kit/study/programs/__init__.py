"""Compiled programs that train many trials at once: what shares one, how trials stack, the step, groups that fit."""
