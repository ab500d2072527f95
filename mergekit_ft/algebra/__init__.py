"""Pure tensor functions that methods share; in place, in float32 (float64 for float64 sources)."""
