"""What an actor holds, and nothing of Ray: an engine with its roles, mail, transfers and heart. Tests hold one too."""
