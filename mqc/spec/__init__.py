"""Quantization schemes as frozen data with a versioned JSON form."""
