"""The gated sum of experts: cases, their tensors, the float64 oracle, floors and peers."""
