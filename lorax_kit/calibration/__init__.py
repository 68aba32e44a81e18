"""What data say of each site: sums over its inputs, gradients of a loss. Starts and compression read it."""

from lorax_kit.calibration.calibrate import COLLECT, Moments, calibrate

__all__ = ["COLLECT", "Moments", "calibrate"]
