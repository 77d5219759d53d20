"""What the preconditioners cost beside plain SGD: time, memory and FLOPs, per setting, per phase and per layer."""
