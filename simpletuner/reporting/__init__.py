"""What a run tells the world: events, the bus that carries them, and the sinks that show or keep them."""
