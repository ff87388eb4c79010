"""Layers; `contexts/` and `stream/` are whole machines, CVFP's and that of streamed weights."""
