"""How weights move: optimizers by name, their state without pickle, schedules, EMA, clipping."""
