"""Keeps torch's structured trace out of pytest's log capture, where it costs more than tracing."""

from __future__ import annotations

import logging

logging.getLogger("torch.__trace").propagate = False
