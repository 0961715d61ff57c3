"""What is measured, at which shapes and against which targets, and how."""
