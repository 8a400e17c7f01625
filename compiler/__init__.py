"""The compiler: checkpoint, captured program, passes, artifact."""
