"""Stories: a cast, a plot, and what a request asked for."""
