"""Pages of HTML: their look, their charts, the report of a training."""
