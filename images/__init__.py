"""Container images: what goes into one, its Dockerfile, its tag, and the engine that builds, moves and runs it."""
