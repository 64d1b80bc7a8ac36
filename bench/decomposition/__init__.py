"""Making a task's experts: the layers and their task vectors, peers, and the check against float64 LAPACK."""
