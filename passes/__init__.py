"""Graph passes, one a file: program in, program out, changed or not, and why not."""
