//! Groups of rows of a mask that keep similar columns.

/// Divides rows into groups of `size` (the last may have fewer), so that rows of a group keep columns in common.
/// `rows[r]` holds the kept columns of row `r`, in rising order, each below `columns`. Rows of a group stand in rising
/// order, groups in the order in which they were found.
///
/// Greedy: a group begins with the row that keeps most of those left, and takes in turn the row whose columns are kept
/// by the largest share of the group. Ties go to the lowest row.
pub fn group_rows(rows: &[Vec<u32>], columns: usize, size: usize) -> Vec<Vec<usize>> {
    // Which rows keep a column: a row that joins a group changes the affinity of these alone.
    let mut keepers = vec![Vec::new(); columns];
    for (row, own) in rows.iter().enumerate() {
        own.iter().for_each(|&column| keepers[column as usize].push(row));
    }
    let mut left: Vec<usize> = (0..rows.len()).collect();
    let mut groups = Vec::new();
    // How often the columns of each row are kept in the group.
    let mut shared = vec![0u32; rows.len()];
    while !left.is_empty() {
        shared.fill(0);
        let mut group = Vec::new();
        while group.len() < size && !left.is_empty() {
            let affinity = |row: usize| match group.is_empty() {
                true => rows[row].len() as f64,
                false => f64::from(shared[row]) / rows[row].len().max(1) as f64,
            };
            let better = |best: usize, i: usize| if affinity(left[i]) > affinity(left[best]) { i } else { best };
            let row = left.remove((0..left.len()).reduce(better).expect("rows are left"));
            for &column in &rows[row] {
                keepers[column as usize].iter().for_each(|&keeper| shared[keeper] += 1);
            }
            group.push(row);
        }
        group.sort_unstable();
        groups.push(group);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::group_rows;

    #[test]
    fn planted_groups_are_found() {
        // Row r keeps ten of the twelve columns of block r % 4, other ones for each row.
        let rows: Vec<Vec<u32>> =
            (0..32u32).map(|r| (0..12).filter(|c| c % 6 != r % 5).map(|c| r % 4 * 12 + c).collect()).collect();
        let mut groups = group_rows(&rows, 48, 8);
        groups.sort();
        let planted: Vec<Vec<usize>> = (0..4).map(|block| (0..8).map(|i| 4 * i + block).collect()).collect();
        assert_eq!(groups, planted);
    }

    #[test]
    fn every_row_is_in_one_group() {
        let rows: Vec<Vec<u32>> = vec![vec![], vec![3], vec![], vec![0, 3], vec![1]];
        let groups = group_rows(&rows, 4, 2);
        assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        let mut all = groups.concat();
        all.sort();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert_eq!(groups[0], [1, 3]);
    }
}
