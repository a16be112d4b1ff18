"""How the processes of a job live and end together: joining, agreeing, watching, stopping."""
