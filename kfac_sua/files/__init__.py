"""Files that survive kills, full disks, links and pipes: opened, written and locked with errors that name them."""
