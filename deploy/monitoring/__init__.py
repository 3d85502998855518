"""Monitoring: source of the dashboard, the rules and the scrape configuration."""
