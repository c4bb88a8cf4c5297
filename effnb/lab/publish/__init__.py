"""Publishing: scoreboard, performance, README, pictures and the site, from results alone."""
