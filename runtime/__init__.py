"""The ground floor: the HiF4 format, its operators, and what opens and runs an artifact."""

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.pipeline import load_pipeline
from hif4c.runtime.transformer import load

__all__ = ["Hif4Error", "dequantize", "load", "load_pipeline", "quantize"]
