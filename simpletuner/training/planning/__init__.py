"""Memory of a run before it starts: what it takes, from shapes, and which settings make it fit."""
