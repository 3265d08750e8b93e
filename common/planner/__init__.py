"""Which layout for which model, machine and load: what a rank holds, does and says in a step, and how fast it is at best."""
