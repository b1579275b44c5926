//! What people see: progress, tables, heat maps, pages.

mod colour;
pub mod heatmap;
pub mod page;
pub mod progress;
pub mod table;
