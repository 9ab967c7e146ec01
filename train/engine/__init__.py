"""How a run goes: the loop, processes, checkpoints, logs, and how a command ends."""
