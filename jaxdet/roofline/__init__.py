"""What a step should take on a chip, from shapes alone: expected, not measured."""
