"""What training changes in a base's weights, and how to undo it."""
