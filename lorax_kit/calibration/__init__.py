"""What calibration data say of each site: sums over its inputs, and gradients of a loss. Starts and compression read it."""

from lorax_kit.calibration.calibrate import Moments, calibrate

__all__ = ["Moments", "calibrate"]
