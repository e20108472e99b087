"""Pure maths on tensors: how one delta becomes bytes and comes back."""
