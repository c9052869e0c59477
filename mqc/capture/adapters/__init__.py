"""What differs between model families: one thin adapter per kind of geometry.

Everything else in mqc is found in the graph; an adapter says only what the graph cannot: which
inputs the vision tower takes for one call, how a processor's output splits into such calls, and
which positions the tokens have. Adapters are made from a configuration alone, so the run-time host
of a compiled artifact uses the same ones: ``adapter_for(folder_with_config_json)``.

Most families need none. :class:`Adapter` itself fits a family whose ``get_image_features`` takes
tiles of one fixed size and gives one tensor, and whose text positions count 0, 1, 2, ...: with
``pixel_values`` [images, 3, height, width] it needs nothing but the configuration.

How to write one, for a family that needs more:

1.  Add a small configuration to :mod:`mqc.testing.families` and run ``mqc probe`` or
    ``tests/families`` on it: the error names what is missing.
2.  Choose the nearest base: :class:`Adapter` (tiles), :class:`GridAdapter` (flat patches of a
    variable grid). Name in :meth:`~Adapter.vision_inputs` every tensor of *one* call (one image, or
    the tiles of one image), above all what the tower computes from Python numbers (``.tolist()``,
    loops over a grid): such values must be inputs, since no graph can hold them.
3.  :meth:`~Adapter.image_embeds` is traced: call the model's own modules with those inputs.
    :meth:`~Adapter.prepare` may replace a method of the (weightless) model that cannot be traced.
4.  :meth:`~Adapter.vision_calls` and :meth:`~Adapter.position_ids` run at prompt time, without a
    model: they turn what the processor gives into calls and positions.
5.  A family whose prompts hold videos names its :attr:`~Adapter.video_reader`, and gives
    :meth:`~Adapter.video_calls` where :meth:`~Adapter.modalities` tells videos from images. A call
    may be a frame or a whole video, whatever the tower attends.
6.  Put it into its own file here, named after the geometry, decorated with
    ``@register("its_model_type", ...)``, and import the file below. A package outside of mqc does
    the same with :func:`register`.
"""

from __future__ import annotations

from mqc.capture.adapters import (
    any_size,
    features,
    frames,
    grid,
    interpolated,
    merging,
    nested,
    packed,
    prefix,
    queries,
    tables,
    windows,
)
from mqc.capture.adapters.base import (
    LINEAR_ATTENTION,
    Adapter,
    Call,
    DynamicSize,
    Features,
    VisionInput,
)
from mqc.capture.adapters.grid import GridAdapter
from mqc.capture.adapters.registry import adapter_for, is_registered, register

register("deepseek_vl")(Adapter)

__all__ = [
    "LINEAR_ATTENTION",
    "Adapter",
    "Call",
    "DynamicSize",
    "Features",
    "GridAdapter",
    "VisionInput",
    "adapter_for",
    "any_size",
    "features",
    "frames",
    "grid",
    "interpolated",
    "is_registered",
    "merging",
    "nested",
    "packed",
    "prefix",
    "queries",
    "register",
    "tables",
    "windows",
]
