"""Calibration: observers that turn activations into static scales."""

from mqc.calib.observers import Observer, make_observer

__all__ = ["Observer", "make_observer"]
