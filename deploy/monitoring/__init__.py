"""What an operator sees: the dashboard, the rules and how they are scraped, described once."""
