"""The mathematics: schedules, timesteps, tables, denoisers, the one loop, and what training minimises."""
