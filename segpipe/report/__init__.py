"""What people read and take away: tables (CSV, Parquet), figures and the HTML page."""
