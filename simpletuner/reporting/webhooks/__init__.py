"""Tells services what a run does, without ever keeping the run waiting.

`messages` words events, `outbox` holds what waits, `spool` keeps on the disk what must arrive, `encoding` and
`images` makes request bodies, `transport` sends one, `sender` decides when and how often, `sink` ties them to the bus.
"""
