"""The passes, one a file. Each is usable alone and by name."""

import mqc.ops  # noqa: F401  (passes match and build mqc's operators: they must be registered)
