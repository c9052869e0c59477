"""Capture: a Hugging Face vision-language model as a program of three graphs.

Interfaces of the components that :func:`capture` makes (sizes in brackets, ``hidden`` is the
width of the language model):

``vision``
    the family's own inputs for one call (one image of a variable grid, or the tiles of one image)
    -> ``image_embeds`` [visual tokens, hidden], connector included.
``embed``
    ``input_ids`` int64 [batch, tokens] -> ``embeddings`` [batch, tokens, hidden].
``decoder``
    ``inputs_embeds`` [batch, tokens, hidden], ``position_ids`` int64 [batch, tokens] or
    [3, batch, tokens], ``mask`` bool [batch, masks, tokens, past + tokens] (True: may attend; every
    row attends to itself; one mask for each of ``facts["attention_windows"]``), ``logit_index``
    int64 [batch, rows] (rows the head is computed for), ``past_key_i``, ``past_value_i``
    [batch, kv heads, past, head dim] -> ``logits`` [batch, rows, vocabulary], ``present_key_i``,
    ``present_value_i`` [batch, kv heads, past + tokens, head dim]. One graph for prefill, chunks
    and decoding.

Where a family needs them, the decoder has more: ``deepstack_i`` [batch, tokens, hidden] (further
outputs of ``vision``, linked to it; zero in text rows), and for a recurrent layer ``past_conv_i``
and ``past_state_i`` in place of keys and values (``facts["recurrent"]``: rows of padding then have
positions below zero).
"""

from __future__ import annotations

from mqc.capture.adapters import Adapter, GridAdapter, adapter_for, register
from mqc.capture.build import capture, capture_shapes, check_processor
from mqc.capture.locate import checkpoint_folder
from mqc.capture.probe import ProbeReport, probe
from mqc.capture.processor import Processor, load_processor, processor_files

__all__ = [
    "Adapter",
    "GridAdapter",
    "ProbeReport",
    "Processor",
    "adapter_for",
    "capture",
    "capture_shapes",
    "check_processor",
    "checkpoint_folder",
    "load_processor",
    "probe",
    "processor_files",
    "register",
]
