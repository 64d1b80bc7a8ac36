"""A merged model tried out by hand: what it answers, and why."""
