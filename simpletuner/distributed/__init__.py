"""One run in several processes: starting them, joining them, and what they tell each other."""
